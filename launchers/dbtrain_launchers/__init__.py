"""Ways to start `dbtrain train` on one or many machines. Each module translates a launcher's conventions, nothing more."""
