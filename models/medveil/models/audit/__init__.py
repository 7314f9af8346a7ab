"""What a protection is worth: victims trained on it, and what an attacker can recover from them."""
