"""Text -> tokenised, filtered, packed and cached corpus: shards, then one merge."""
