"""What a person does: resolving the quarantine, explaining a case, the doctor."""
