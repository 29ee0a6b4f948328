"""`loratorio-lab bench`: combinations × methods × seeds on the toybox, measured, with tables and plots made by one command."""
