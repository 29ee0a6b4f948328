"""What is the same in every WebUI: how a pass is admitted, enclosed, followed to a refiner and accounted for."""
