namespace MiniSeq.Training;

/// <summary>What is never cut, a target or an assistant's message, does not fit into the maximum length.</summary>
public sealed class SequenceTooLongException(string message) : ArgumentException(message);
