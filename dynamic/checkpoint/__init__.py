"""Reading and writing files of weights; knows no model."""
