"""What is minimised. An objective is called with (model, TrainBatch) and gives a Loss."""
