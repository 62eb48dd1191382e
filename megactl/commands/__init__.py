"""What users type: one short module a command, each parse -> call -> print. Nothing heavy is imported before a command runs."""
