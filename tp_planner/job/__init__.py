"""The processes of a job and their meshes."""
