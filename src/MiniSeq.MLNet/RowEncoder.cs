using MiniSeq.Models;
using MiniSeq.Training;

namespace MiniSeq.MLNet;

/// <summary>How the texts of a row become tokens.</summary>
internal interface IRowEncoder
{
    /// <summary>Texts cut so far.</summary>
    int TruncatedCount { get; }

    /// <summary>A training example of the input column's text and the label column's; null where there is no such column.</summary>
    /// <exception cref="ArgumentException">The texts are not what they should be, or do not fit.</exception>
    TokenSequence Encode(string input, string? label);

    /// <summary>What the model continues, with room for <paramref name="reserve"/> tokens after it; none for a row with nothing to continue.</summary>
    /// <exception cref="ArgumentException">The text is not what it should be, or does not fit.</exception>
    int[] Prompt(string input, int reserve);

    /// <summary>Says before any row is read that there is no room for that many tokens.</summary>
    /// <exception cref="ArgumentException">There is none.</exception>
    void CheckRoom(int reserve);
}

/// <summary>Documents as they are.</summary>
internal sealed class DocumentRows(DocumentEncoder encoder, bool completionOnlyLoss) : IRowEncoder
{
    public int TruncatedCount => encoder.TruncatedCount;

    public TokenSequence Encode(string input, string? label) => encoder.Encode(input, label, completionOnlyLoss);

    public int[] Prompt(string input, int reserve) => encoder.Prompt(input, reserve);

    public void CheckRoom(int reserve) => encoder.Prompt("", reserve);
}

/// <summary>Dialogues in a chat template: one in each input text where there is no label column, else one of the document and the label.</summary>
internal sealed class DialogueRows(DialogueEncoder encoder, bool hasLabels, bool assistantOnlyLoss) : IRowEncoder
{
    public int TruncatedCount => encoder.TruncatedCount;

    public TokenSequence Encode(string input, string? label) => label is null
        ? encoder.Encode(ChatMessage.ParseMessages(input), assistantOnlyLoss)
        : encoder.Encode(input, label, assistantOnlyLoss);

    public int[] Prompt(string input, int reserve) =>
        hasLabels ? encoder.Prompt(input, reserve)
        : input.Length == 0 ? []
        : encoder.Prompt(ChatMessage.ParseMessages(input), reserve);

    public void CheckRoom(int reserve) => encoder.Prompt("", reserve);
}
