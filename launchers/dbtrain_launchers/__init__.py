"""Ways to start `dbtrain train` on one or many machines. Each module translates one launcher's conventions."""
