"""The provider and the database for a laptop: a server and example data, used by the demo and the tests alike."""
