"""What the toybox is made and judged with: its world as drawings, its networks, its classifier. What ships is `loratorio.toybox`."""
