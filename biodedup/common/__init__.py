"""Small parts that all packages use: checks of arguments, forms of results, intervals, renamed names."""
