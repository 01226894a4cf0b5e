"""The pipeline on real input: a text that every Python brings along, and a pretrained model."""
