using Microsoft.ML;
using Microsoft.ML.Data;

namespace MiniSeq.MLNet;

/// <summary>A data view with the generated text added; the model runs as that column is read, and for no other.</summary>
internal sealed class GeneratedTextView(GenerationSession session, IDataView source, ColumnBinding binding) : IDataView
{
    public DataViewSchema Schema => binding.Output;

    public bool CanShuffle => source.CanShuffle;

    public long? GetRowCount() => source.GetRowCount();

    public DataViewRowCursor GetRowCursor(IEnumerable<DataViewSchema.Column> columnsNeeded, Random? rand = null) =>
        new GeneratedTextCursor(session, source, binding, columnsNeeded.Select(c => c.Index).ToHashSet(), rand);

    // One model, so one cursor: several would wait for each other.
    public DataViewRowCursor[] GetRowCursorSet(IEnumerable<DataViewSchema.Column> columnsNeeded, int n, Random? rand = null) => [GetRowCursor(columnsNeeded, rand)];
}

/// <summary>Two cursors over the source: one that the reader sees, and one that runs ahead to fill a batch for the model.</summary>
internal sealed class GeneratedTextCursor : DataViewRowCursor
{
    private readonly GenerationSession _session;
    private readonly ColumnBinding _binding;
    private readonly IReadOnlySet<int> _active;
    private readonly DataViewRowCursor _rows;
    private readonly DataViewRowCursor? _ahead;
    private readonly ValueGetter<ReadOnlyMemory<char>>? _document;
    private IReadOnlyList<string> _batch = [];
    private long _batchStart;
    private bool _disposed;

    public GeneratedTextCursor(GenerationSession session, IDataView source, ColumnBinding binding, IReadOnlySet<int> active, Random? rand)
    {
        (_session, _binding, _active) = (session, binding, active);
        int? seed = rand?.Next(); // both cursors must shuffle alike
        _rows = source.GetRowCursor(binding.PassedThrough(active), Random());
        if (!active.Contains(binding.AddedIndex)) return;
        _ahead = source.GetRowCursor([binding.Source], Random());
        _document = _ahead.GetGetter<ReadOnlyMemory<char>>(binding.Source);

        Random? Random() => seed is { } s ? new Random(s) : null;
    }

    public override DataViewSchema Schema => _binding.Output;

    public override long Position => _rows.Position;

    public override long Batch => _rows.Batch;

    public override ValueGetter<DataViewRowId> GetIdGetter() => _rows.GetIdGetter();

    public override bool IsColumnActive(DataViewSchema.Column column) => _active.Contains(column.Index);

    public override bool MoveNext() => _rows.MoveNext();

    public override ValueGetter<TValue> GetGetter<TValue>(DataViewSchema.Column column)
    {
        ColumnBinding.CheckActive(IsColumnActive(column), column);
        return column.Index == _binding.AddedIndex
            ? ColumnBinding.Cast<TValue>((ref ReadOnlyMemory<char> text) => text = Text(Position).AsMemory(), column)
            : _rows.GetGetter<TValue>(_binding.Input[column.Index]);
    }

    private string Text(long position)
    {
        if (position < 0) throw new InvalidOperationException("The cursor stands before the first row or after the last: call MoveNext.");
        while (position >= _batchStart + _batch.Count)
        {
            _batchStart += _batch.Count;
            bool wanted = position < _batchStart + _session.Settings.InferenceBatchSize; // rows that nobody read are passed over
            var documents = ReadAhead();
            if (documents.Count == 0) throw new InvalidOperationException("The source gave fewer rows when read a second time.");
            _batch = wanted ? _session.Generate(documents, _batchStart) : documents;
        }
        return _batch[(int)(position - _batchStart)];
    }

    private List<string> ReadAhead()
    {
        var documents = new List<string>(_session.Settings.InferenceBatchSize);
        ReadOnlyMemory<char> document = default;
        while (documents.Count < _session.Settings.InferenceBatchSize && _ahead!.MoveNext())
        {
            _document!(ref document);
            documents.Add(document.ToString());
        }
        return documents;
    }

    protected override void Dispose(bool disposing)
    {
        if (disposing && !_disposed)
        {
            _disposed = true;
            _rows.Dispose();
            _ahead?.Dispose();
        }
        base.Dispose(disposing);
    }
}
