"""The pool of pages: who holds each, which are free, and the slot-level contract over it."""
