"""Memory and time of training, on one machine or many, from shapes alone: nothing here is run."""
