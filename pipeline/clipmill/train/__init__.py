"""Train taggers from shards: the loop and all that it is made of, evaluation and prediction."""
