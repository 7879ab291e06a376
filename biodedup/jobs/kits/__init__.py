"""Packs the captures of field kits (teams without a network) into signed batch files, and ingests these at the centre."""
