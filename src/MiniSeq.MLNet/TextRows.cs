using Microsoft.ML;
using Microsoft.ML.Data;
using MiniSeq.Models;
using MiniSeq.Training;

namespace MiniSeq.MLNet;

/// <summary>Rows that were read.</summary>
/// <param name="Sequences">Training examples.</param>
/// <param name="Empty">Rows skipped for an empty text.</param>
/// <param name="TooLong">Rows skipped for a label, or an assistant's messages, longer than the maximum length allows.</param>
internal sealed record ReadRows(List<TokenSequence> Sequences, int Empty, int TooLong);

/// <summary>Text columns of a data view: their checks in ML.NET's words, and their rows as token sequences.</summary>
internal static class TextRows
{
    public static DataViewSchema.Column Column(DataViewSchema schema, string role, string name)
    {
        var column = schema.GetColumnOrNull(name) ?? throw Missing(role, name);
        return column.Type is TextDataViewType ? column : throw Mistyped(role, name, column.Type.ToString()!);
    }

    public static void Check(SchemaShape schema, string role, string name)
    {
        var found = schema.Where(c => c.Name == name).ToList();
        if (found.Count == 0) throw Missing(role, name);
        var column = found[^1];
        if (column.Kind != SchemaShape.Column.VectorKind.Scalar) throw Mistyped(role, name, $"{column.Kind} of {column.ItemType}");
        if (column.ItemType is not TextDataViewType) throw Mistyped(role, name, column.ItemType.ToString()!);
    }

    /// <summary>The rows as training examples, but for those with an empty text in one of the columns or a label that does not fit.</summary>
    public static ReadRows Read(IDataView data, string input, string? label, IRowEncoder encoder, CancellationToken cancellationToken)
    {
        var inputColumn = Column(data.Schema, "input", input);
        DataViewSchema.Column? labelColumn = label is null ? null : Column(data.Schema, "label", label);
        using var cursor = data.GetRowCursor(labelColumn is { } l ? [inputColumn, l] : [inputColumn]);
        var getInput = cursor.GetGetter<ReadOnlyMemory<char>>(inputColumn);
        var getLabel = labelColumn is { } given ? cursor.GetGetter<ReadOnlyMemory<char>>(given) : null;
        ReadOnlyMemory<char> document = default, target = default;
        var sequences = new List<TokenSequence>();
        int empty = 0, tooLong = 0;
        while (cursor.MoveNext())
        {
            cancellationToken.ThrowIfCancellationRequested();
            getInput(ref document);
            getLabel?.Invoke(ref target);
            if (document.IsEmpty || (getLabel is not null && target.IsEmpty)) empty++;
            else if (Encode(cursor.Position) is { } sequence) sequences.Add(sequence);
            else tooLong++;
        }
        return new ReadRows(sequences, empty, tooLong);

        TokenSequence? Encode(long row)
        {
            try
            {
                return encoder.Encode(document.ToString(), getLabel is null ? null : target.ToString());
            }
            catch (SequenceTooLongException)
            {
                return null;
            }
            catch (ArgumentException e)
            {
                throw InRow(row, e);
            }
        }
    }

    /// <summary>The same error, with the place of the row.</summary>
    public static ArgumentException InRow(long row, ArgumentException error) => new($"Row {row}: {error.Message}", error);

    private static ArgumentOutOfRangeException Missing(string role, string name) =>
        new("inputSchema", $"Could not find {role} column '{name}'{(role == "label" ? " (LabelColumnName = null learns the input text itself)" : "")}");

    private static ArgumentOutOfRangeException Mistyped(string role, string name, string got) =>
        new("inputSchema", $"Schema mismatch for {role} column '{name}': expected String, got {got}");
}
