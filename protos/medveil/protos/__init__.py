"""What travels between the two sides, as protobuf."""
