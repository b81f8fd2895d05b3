"""Media to patches: fetch, decode, choose frames, resize, cut. Loads without torch (``exact`` excepted, on use)."""
