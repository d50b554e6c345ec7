"""Run by alembic: the migrations happen on the connection, and in the transaction, that schema.py hands over."""

from alembic import context

connection = context.config.attributes["connection"]
context.configure(connection=connection, transactional_ddl=True)
if connection.dialect.name == "postgresql":
    # another host may be at it; the number is "systemfi"
    connection.exec_driver_sql("SELECT pg_advisory_xact_lock(8320808730298771049)")
with context.begin_transaction():
    context.run_migrations()
