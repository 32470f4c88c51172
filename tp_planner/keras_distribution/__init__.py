"""``keras.distribution`` on the torch backend: Keras's own classes and calls, carried out by plans."""
