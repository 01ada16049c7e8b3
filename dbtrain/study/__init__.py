"""`dbtrain study`: which recipe buys the most for its cost. `variants.py` makes the recipes, `running.py` trains and
scores them on pilot subjects, `findings.py` compares them, `telling.py` writes what came out, beside the page
(`report/study_page.py`)."""
