"""What differs between models: a class for each family, found from a model's configurations, and its noise process."""
