"""The one loop and what it stands on. It knows rows, a loss and its terms; never an algorithm's name."""
