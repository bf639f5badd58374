"""Who holds what until when, and who agrees with whom: the server, its stores and its client."""
