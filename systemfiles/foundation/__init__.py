"""What everything else stands on: values, formats and file primitives. Imports nothing of the other floors."""
