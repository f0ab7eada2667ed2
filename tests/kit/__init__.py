"""What the tests use to be honest: a real broker, a bad network, a scripted broker, an observer."""
