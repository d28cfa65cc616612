"""What is said about the methods: where their losses are least, what a step holds, how they
compare. It stands above the scripts; nothing that they import may import it."""
