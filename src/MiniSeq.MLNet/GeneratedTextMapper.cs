using Microsoft.ML;
using Microsoft.ML.Data;

namespace MiniSeq.MLNet;

/// <summary>The same for one row at a time, as <c>PredictionEngine</c> asks for it.</summary>
internal sealed class GeneratedTextMapper(GenerationSession session, ColumnBinding binding) : IRowToRowMapper
{
    public DataViewSchema InputSchema => binding.Input;

    public DataViewSchema OutputSchema => binding.Output;

    public IEnumerable<DataViewSchema.Column> GetDependencies(IEnumerable<DataViewSchema.Column> dependingColumns)
    {
        var active = dependingColumns.Select(c => c.Index).ToHashSet();
        if (active.Contains(binding.AddedIndex)) active.Add(binding.Source.Index);
        return binding.PassedThrough(active);
    }

    public DataViewRow GetRow(DataViewRow input, IEnumerable<DataViewSchema.Column> activeColumns) =>
        new GeneratedTextRow(session, binding, input, activeColumns.Select(c => c.Index).ToHashSet());
}

internal sealed class GeneratedTextRow(GenerationSession session, ColumnBinding binding, DataViewRow input, IReadOnlySet<int> active) : DataViewRow
{
    private bool _disposed;

    public override DataViewSchema Schema => binding.Output;

    public override long Position => input.Position;

    public override long Batch => input.Batch;

    public override ValueGetter<DataViewRowId> GetIdGetter() => input.GetIdGetter();

    public override bool IsColumnActive(DataViewSchema.Column column) => active.Contains(column.Index);

    public override ValueGetter<TValue> GetGetter<TValue>(DataViewSchema.Column column)
    {
        ColumnBinding.CheckActive(IsColumnActive(column), column);
        return column.Index == binding.AddedIndex ? ColumnBinding.Cast<TValue>(Generated(), column) : input.GetGetter<TValue>(binding.Input[column.Index]);
    }

    // Once a row, however often it is read.
    private ValueGetter<ReadOnlyMemory<char>> Generated()
    {
        var document = input.GetGetter<ReadOnlyMemory<char>>(binding.Source);
        long at = -1;
        string generated = "";
        return (ref ReadOnlyMemory<char> text) =>
        {
            if (at < 0 || at != input.Position)
            {
                ReadOnlyMemory<char> read = default;
                document(ref read);
                generated = session.Generate([read.ToString()])[0];
                at = input.Position;
            }
            text = generated.AsMemory();
        };
    }

    protected override void Dispose(bool disposing)
    {
        if (disposing && !_disposed)
        {
            _disposed = true;
            input.Dispose();
        }
        base.Dispose(disposing);
    }
}
