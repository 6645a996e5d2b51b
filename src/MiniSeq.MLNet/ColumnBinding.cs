using Microsoft.ML;
using Microsoft.ML.Data;

namespace MiniSeq.MLNet;

/// <summary>A schema, one of its columns as source, and the schema with one text column added at the end.</summary>
internal sealed class ColumnBinding
{
    public ColumnBinding(DataViewSchema input, DataViewSchema.Column source, string outputColumnName)
    {
        (Input, Source, AddedIndex) = (input, source, input.Count);
        var builder = new DataViewSchema.Builder();
        builder.AddColumns(input);
        builder.AddColumn(outputColumnName, TextDataViewType.Instance);
        Output = builder.ToSchema();
    }

    public DataViewSchema Input { get; }

    public DataViewSchema Output { get; }

    public DataViewSchema.Column Source { get; }

    public int AddedIndex { get; }

    /// <summary>The columns of the input among some of the output.</summary>
    public IEnumerable<DataViewSchema.Column> PassedThrough(IReadOnlySet<int> active) => Input.Where(c => active.Contains(c.Index));

    public static ValueGetter<TValue> Cast<TValue>(ValueGetter<ReadOnlyMemory<char>> getter, DataViewSchema.Column column) =>
        getter as ValueGetter<TValue> ?? throw new InvalidOperationException($"Invalid TValue in GetGetter for column '{column.Name}': it holds {typeof(ReadOnlyMemory<char>)}, and {typeof(TValue)} is asked for.");

    public static void CheckActive(bool active, DataViewSchema.Column column)
    {
        if (!active) throw new InvalidOperationException($"Column '{column.Name}' was not asked for when the cursor was made.");
    }
}
