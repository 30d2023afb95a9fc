"""Text -> tokenised, filtered, packed and cached corpus: first shards, then one merge."""
