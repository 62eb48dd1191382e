"""What this machine is: what runs record of it, and what `megactl doctor` checks. Torch is not needed."""
