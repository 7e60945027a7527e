"""Monitoring: does the world still look as it did when the models were trained?"""
