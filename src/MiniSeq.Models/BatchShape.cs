namespace MiniSeq.Models;

/// <summary>What the memory of a step depends on of its batch.</summary>
/// <param name="Rows">Tokens of all documents.</param>
/// <param name="Targets">Labels that count.</param>
/// <param name="WantedRows">Rows from each document's first target on: the last layer runs on those alone.</param>
/// <param name="LongestDocument">Tokens of the longest one.</param>
/// <param name="Documents">How many there are.</param>
public sealed record BatchShape(long Rows, long Targets, long WantedRows, long LongestDocument, int Documents = 1)
{
    /// <summary>One document, the last of whose tokens are to be predicted.</summary>
    /// <param name="rows">Its tokens.</param>
    /// <param name="targets">How many are predicted; null is all but the first.</param>
    public static BatchShape Document(long rows, long? targets = null)
    {
        long wanted = targets ?? Math.Max(1, rows - 1);
        return new BatchShape(rows, wanted, Math.Min(rows, wanted + 1), rows); // the last token predicts nothing, and is behind the first target
    }

    /// <exception cref="ArgumentOutOfRangeException">No row, or more targets or wanted rows than rows.</exception>
    internal void Validate()
    {
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(Rows);
        ArgumentOutOfRangeException.ThrowIfNegative(Targets);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(Targets, Rows);
        ArgumentOutOfRangeException.ThrowIfNegative(WantedRows);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(WantedRows, Rows);
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(LongestDocument);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(LongestDocument, Rows);
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(Documents);
    }
}
