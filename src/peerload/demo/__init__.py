"""The main job shown on one machine: real processes, real engine, real bytes, and a table at the end."""
