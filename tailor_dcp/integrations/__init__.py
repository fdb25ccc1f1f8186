"""Training frameworks whose state is not a module's and an optimizer's; the library itself never imports these."""
