"""What is shown with a picture: weight maps, labelled sheets, infotext."""
