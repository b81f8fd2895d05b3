"""The fonts that synth draws with: file, Debian package and SHA-256 of each, for training and held out.

Training and held-out fonts are of different families. The hashes were taken from Debian 12 (bookworm); another
release may ship other versions of a file, which the font set ``debian`` refuses and ``debian-any`` accepts.
``builtin`` is the one face embedded in Pillow: it needs no package, and is the same for both splits.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from mirada.errors import NotAvailable, SettingsError

FONT_ROOT = Path("/usr/share/fonts")
FONT_SETS = ("debian", "debian-any", "builtin")


@dataclass(frozen=True, slots=True)
class FontFile:
    """One font file: Debian package, path below ``FONT_ROOT``, SHA-256 in hex."""

    package: str
    path: str
    sha256: str

    @property
    def name(self) -> str:
        return Path(self.path).name


BUILTIN = FontFile("", "builtin", "")

TRAIN_FONTS = (
    FontFile(
        "fonts-dejavu-core",
        "truetype/dejavu/DejaVuSans.ttf",
        "abdc775b21b1bc470d50c97e790d276f2054b7504e56e5bd3e64f48d68582322",
    ),
    FontFile(
        "fonts-dejavu-core",
        "truetype/dejavu/DejaVuSans-Bold.ttf",
        "0d977336a6d5fba34eab8e3199eb218327161b5143749f802982c2bc34df0c96",
    ),
    FontFile(
        "fonts-dejavu-extra",
        "truetype/dejavu/DejaVuSans-Oblique.ttf",
        "eef1a593cc0a4654f147fd1aa9a11e7d327eb8be6f3a35099182db6aeb5d28fe",
    ),
    FontFile(
        "fonts-dejavu-core",
        "truetype/dejavu/DejaVuSansMono.ttf",
        "0f5db4f1749979d961019838b160bec74abdf7f9eca69553fe1aa856bbff49a4",
    ),
    FontFile(
        "fonts-dejavu-core",
        "truetype/dejavu/DejaVuSansMono-Bold.ttf",
        "2964f6dac8e6e9d71613928340f17bf868e9ea51692cca333c79e74962f02233",
    ),
    FontFile(
        "fonts-dejavu-core",
        "truetype/dejavu/DejaVuSerif.ttf",
        "13e61509f5c81d7c3132810f4f903e3523df89c802bf6e0674621e8f659cdfe1",
    ),
    FontFile(
        "fonts-dejavu-core",
        "truetype/dejavu/DejaVuSerif-Bold.ttf",
        "e2fd85eba2de65ac270d1cdb1685e252eb827f600850cf62af2d20c41b22e945",
    ),
    FontFile(
        "fonts-dejavu-extra",
        "truetype/dejavu/DejaVuSansCondensed.ttf",
        "2d8aa290adcf1ebcbb35f63e57cf32941b012eaab4b65096b904112cf3bac972",
    ),
    FontFile(
        "fonts-liberation",
        "truetype/liberation/LiberationSans-Regular.ttf",
        "f8ace1f892b2bd9dc1792ba7f097fa7588f84fed48321480e04de5390828221f",
    ),
    FontFile(
        "fonts-liberation",
        "truetype/liberation/LiberationSans-Bold.ttf",
        "361c61b82d575c5c35fd9157fda8b0194bcfcd0d88ea8521a4fb5dd53d33dddc",
    ),
    FontFile(
        "fonts-liberation",
        "truetype/liberation/LiberationSans-Italic.ttf",
        "832b4406dbef23628800d3aaad21048534ac84d7e3ad955be83b8172ed8ef512",
    ),
    FontFile(
        "fonts-liberation",
        "truetype/liberation/LiberationSerif-Regular.ttf",
        "1c9c77c2cd0f3c2d2aeef53ea50a4d5d3d684ac73a431d7c70d7864887d194a3",
    ),
    FontFile(
        "fonts-liberation",
        "truetype/liberation/LiberationSerif-Bold.ttf",
        "af228b9de767e5162168e433351b3d0e086648219c6c12ed888fba0bda3694d5",
    ),
    FontFile(
        "fonts-liberation",
        "truetype/liberation/LiberationSerif-Italic.ttf",
        "ccd19036f8e8599e920345105df8d21eb27a66b700ac23968fb14d70259ddb1e",
    ),
    FontFile(
        "fonts-liberation",
        "truetype/liberation/LiberationMono-Regular.ttf",
        "a2e642d350acb1c5e368f375db8a4ef5a2f4ff2b79056d8c3be8bd8a7e9fcb44",
    ),
    FontFile(
        "fonts-liberation",
        "truetype/liberation/LiberationMono-Bold.ttf",
        "267ae0b63fc67980d11fc4cbb630de84d845c6bf350988ec56766baf98706b8b",
    ),
    FontFile(
        "fonts-liberation",
        "truetype/liberation/LiberationSansNarrow-Regular.ttf",
        "ab9719545aeb24156c462601f92bf4897130beaac59ad79bea7da264bce69b19",
    ),
    FontFile(
        "fonts-freefont-ttf",
        "truetype/freefont/FreeSans.ttf",
        "0b602f2825b30f9faa772c2ca25b1ce05b6255c9bf02dd8ca088ae51f9f737bb",
    ),
    FontFile(
        "fonts-freefont-ttf",
        "truetype/freefont/FreeSansBold.ttf",
        "e8b93173d6d8214fb74a068663d3721fdca612bbf3f98973dddb7067b131a0cf",
    ),
    FontFile(
        "fonts-freefont-ttf",
        "truetype/freefont/FreeSerif.ttf",
        "12ee050384c99c97a6873708a3aebde3d795de8d8ed069b1a0e3274ab3e5be03",
    ),
    FontFile(
        "fonts-freefont-ttf",
        "truetype/freefont/FreeSerifBold.ttf",
        "12bd953ceb1fa8c7d7386c3d026bd3b004bf07640d8603cc803db7ceb7d9fb99",
    ),
    FontFile(
        "fonts-freefont-ttf",
        "truetype/freefont/FreeMonoBold.ttf",
        "30b4b98748839431a366123f859871549b57e461a8b8ec2d3d65b55b2fb9f22d",
    ),
    FontFile(
        "fonts-roboto-unhinted",
        "truetype/roboto/unhinted/RobotoTTF/Roboto-Regular.ttf",
        "797e35f7f5d6020a5c6ea13b42ecd668bcfb3bbc4baa0e74773527e5b6cb3174",
    ),
    FontFile(
        "fonts-roboto-unhinted",
        "truetype/roboto/unhinted/RobotoTTF/Roboto-Bold.ttf",
        "36f3709dea3e3ce3c6aedc058079e55980825f898f1e901d091c73c40de8bab1",
    ),
    FontFile(
        "fonts-roboto-unhinted",
        "truetype/roboto/unhinted/RobotoTTF/Roboto-Italic.ttf",
        "5cd9337020d0b1593bae42dcca5cfc0fb86f5806ef469d66d09eae1e56ce346b",
    ),
    FontFile(
        "fonts-roboto-unhinted",
        "truetype/roboto/unhinted/RobotoTTF/Roboto-Light.ttf",
        "e5c6b2b3cad15fd7dd820970eb859635d75bb2155b1a70f78a0668f8ba6d6eef",
    ),
    FontFile(
        "fonts-roboto-unhinted",
        "truetype/roboto/unhinted/RobotoCondensed-Regular.ttf",
        "936069d5e46da383bff37b629a73e0bfb8b8ac7bc54cfb927fb700f6a890e9aa",
    ),
    FontFile(
        "fonts-lato", "truetype/lato/Lato-Regular.ttf", "0ad460bd756454f8485609747b25c5644a54d307a65daabbb24c646c112ed541"
    ),
    FontFile("fonts-lato", "truetype/lato/Lato-Bold.ttf", "e0b1c4de011de8dd077cf21f97919fc31158eb290ee1176cbae06d500a6304bc"),
    FontFile("fonts-lato", "truetype/lato/Lato-Italic.ttf", "bbc138d69289c5604474166e150d39995770ca98ffb9df02adb68666ec36cc37"),
    FontFile("fonts-lato", "truetype/lato/Lato-Black.ttf", "19d661d659af129704947b0027e5b77bef2bd43b7ced2973b350225f73fac07c"),
    FontFile(
        "fonts-crosextra-carlito",
        "truetype/crosextra/Carlito-Regular.ttf",
        "b4ff23ba370cc95a3c349336b73f9c28514a1371210f89832efc85c4b1ea7131",
    ),
    FontFile(
        "fonts-crosextra-carlito",
        "truetype/crosextra/Carlito-Bold.ttf",
        "0f62ab34ad5d079a0a28fac01bcf7c7a724a4db4d6cb99cab9cabff382fbb80f",
    ),
    FontFile(
        "fonts-hack", "truetype/hack/Hack-Regular.ttf", "9f67c8a8cd28498525639437d6fac588c452e8572945c790db7641cc7907a69b"
    ),
    FontFile("fonts-hack", "truetype/hack/Hack-Bold.ttf", "21300a514e536d66e73f6d0f68f3820afbeadf58c21bcc5433052b46aacee27f"),
    FontFile(
        "fonts-inconsolata",
        "truetype/inconsolata/Inconsolata.otf",
        "1561e616c414a1b82d6e6dfbd18e5726fd65028913ade191e5fa38b6ec375a1a",
    ),
    FontFile(
        "fonts-ebgaramond",
        "opentype/ebgaramond/EBGaramond12-Regular.otf",
        "4ee3bdb3a6618e74ac13a7b2c0a5079fa949be94a25736008ddb9f8b2e492963",
    ),
    FontFile(
        "fonts-ebgaramond",
        "opentype/ebgaramond/EBGaramond12-Bold.otf",
        "9a65d97bb80ebd3e564791de7a372312c86cc3f9bc3c2b673c786e61e7f15edb",
    ),
    FontFile(
        "fonts-comic-neue",
        "opentype/comic-neue/ComicNeue-Regular.otf",
        "2728ee8f303e31934e62bf27b044fd7657b0613412d51f7444db1078cc3a7cb2",
    ),
    FontFile(
        "fonts-comic-neue",
        "opentype/comic-neue/ComicNeue-Bold.otf",
        "0637fea8f858cd1d9a6e0ff786bed3d8cc2dc59b871a28e268a5a0106f052a92",
    ),
    FontFile(
        "fonts-noto-core",
        "truetype/noto/NotoSans-Regular.ttf",
        "89c3c497f618fdaa0b2d1e98fef93582f28c71debd2c4a8cdf41f190ced2909d",
    ),
    FontFile(
        "fonts-noto-core", "truetype/noto/NotoSans-Bold.ttf", "e83493c945848ecd4a9ad0f6d19164541a0d3e23a9c952304a00a46e00272ac5"
    ),
    FontFile(
        "fonts-noto-core",
        "truetype/noto/NotoSans-Italic.ttf",
        "5d7618dda819443fd07301c84adcee9fe8960c873ea5e5e1f0f59db384b78082",
    ),
    FontFile(
        "fonts-linuxlibertine",
        "opentype/linux-libertine/LinLibertine_R.otf",
        "057bbfa1ac76133c8ae596eff0baf1fd662b2b60e830e6d45cfec5d21489eda3",
    ),
    FontFile(
        "fonts-linuxlibertine",
        "opentype/linux-libertine/LinLibertine_RB.otf",
        "56acd1e11373900e5420b9216f591a08050a9017284ac60ea56ddbaa53a58e02",
    ),
)

HELD_FONTS = (
    FontFile(
        "fonts-open-sans",
        "truetype/open-sans/OpenSans-Regular.ttf",
        "e64e508b2aa2880f907e470c4550980ec4c0694d103a43f36150ac3f93189bee",
    ),
    FontFile(
        "fonts-open-sans",
        "truetype/open-sans/OpenSans-BoldItalic.ttf",
        "3ca680f2444cc9e50447d057c006464566e92f2e77b0b6e26491e5bd757ed4e7",
    ),
    FontFile(
        "fonts-crosextra-caladea",
        "truetype/crosextra/Caladea-Regular.ttf",
        "f1e899278b7b4491aba5b6a8253c4b04c050cc59b21865be5c37559a775153cd",
    ),
    FontFile(
        "fonts-crosextra-caladea",
        "truetype/crosextra/Caladea-Bold.ttf",
        "ae3cb2dcbc925809dd29d2a44e9802211cab66be541bacbfc9c08c74b27c3742",
    ),
    FontFile(
        "fonts-firacode",
        "truetype/firacode/FiraCode-Regular.ttf",
        "bb7f3fc4bd68bbbb16b3bf204bc96d9ba7b4a1a6fc221bba49e2b2a03390e76c",
    ),
    FontFile(
        "fonts-linuxlibertine",
        "opentype/linux-libertine/LinBiolinum_R.otf",
        "f3cf97ba8cc3a511729bb3ff701d9ff038d94c4c72d2998ee9b40aece8d33f52",
    ),
    FontFile(
        "fonts-cantarell",
        "opentype/cantarell/Cantarell-Regular.otf",
        "c4d47d7fbd61863265a39e4944331178337fb0d5d93b45a70233180b6b7df260",
    ),
    FontFile(
        "fonts-cantarell",
        "opentype/cantarell/Cantarell-Bold.otf",
        "027924588c05e5fb38717dee6e50562bcc2a89c21e713bb2434a7f454d0c4fa4",
    ),
    FontFile(
        "fonts-noto-core",
        "truetype/noto/NotoSerif-Regular.ttf",
        "9d7583b7dc9e812afd32a14280c5cac3160012efe50c8d08938f4fea266ff67f",
    ),
    FontFile(
        "fonts-noto-core",
        "truetype/noto/NotoSerif-Italic.ttf",
        "bc25600aa27cd409e1e5b3d86340df3a329bb860fcfbe57a03a95070b229e1b0",
    ),
)


def font_files(fonts: str, split: str) -> tuple[FontFile, ...]:
    """The files of a font set for one split. Raises SettingsError for an unknown set."""
    if fonts not in FONT_SETS:
        raise SettingsError(f"font set {fonts!r} is unknown", f"use one of {', '.join(FONT_SETS)}")
    if fonts == "builtin":
        return (BUILTIN,)
    return HELD_FONTS if split == "held" else TRAIN_FONTS


def missing_packages(split: str | None = None) -> list[str]:
    """Debian packages whose files are not on this machine (of one split, or of both)."""
    files = TRAIN_FONTS * (split != "held") + HELD_FONTS * (split != "train")
    return sorted({file.package for file in files if not (FONT_ROOT / file.path).is_file()})


@functools.lru_cache(maxsize=None)
def font_bytes(file: FontFile, strict: bool, root: Path = FONT_ROOT) -> bytes:
    """The checked bytes of a font file.

    Raises NotAvailable when the file is absent (naming every missing package), or when ``strict`` and its hash differs.
    """
    path = root / file.path
    if not path.is_file():
        packages = " ".join(missing_packages() or [file.package])
        raise NotAvailable(
            f"font file {path} is missing",
            f"run: apt-get install --no-install-recommends {packages}; or draw with fonts='builtin'",
        )
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if strict and digest != file.sha256:
        raise NotAvailable(
            f"font file {path} has SHA-256 {digest}, expected {file.sha256}",
            f"install the Debian 12 version of {file.package}, or accept other versions with fonts='debian-any'",
        )
    return data
