"""Background jobs that keep a subscription service's database and its payment provider in agreement."""
