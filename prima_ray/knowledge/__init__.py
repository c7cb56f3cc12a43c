"""Medical literature -> what it says of each risk factor. Models, losses and training know nothing of it."""
