print("doctor: to be written")
