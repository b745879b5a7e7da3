"""Where images with labels come from: files of several formats, each read into the same two parts."""
