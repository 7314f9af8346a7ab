"""Version 1 of the wire: generated messages (``*_pb2``) and what both sides hold fixed (``conventions``)."""
