from querit.cli import app

app()
