"""Record schemas, chat rendering, tokenized examples, streams of batches and the sample data."""
