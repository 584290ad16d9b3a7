"""What a run or an analysis found, as one page that opens offline."""
