"""From microphone to loudspeaker: the loop, what a person sees of it, and what it leaves behind."""
