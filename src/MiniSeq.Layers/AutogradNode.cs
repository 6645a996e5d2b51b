using System.Runtime.InteropServices;
using static TorchSharp.torch;

namespace MiniSeq.Layers;

/// <summary>
/// A custom autograd function whose faults stay .NET exceptions and whose saved tensors are freed as soon as they are used.
/// </summary>
/// <remarks>
/// TorchSharp's own <c>SingleTensorFunction</c> ends the process when a managed exception is thrown in backward, and keeps saved
/// tensors until the graph dies. This node sits on the same exported symbols of libLibTorchSharp and has neither fault: an
/// exception in backward is kept, the engine is handed zero gradients and raises its own error, and <see cref="Backward"/> rethrows
/// the original. Backward runs in a dispose scope of its own, so it is safe on the engine's device threads.
/// </remarks>
public sealed unsafe class AutogradNode
{
    private static readonly HashSet<AutogradNode> s_alive = [];
    private static Exception? s_pending;
    [ThreadStatic] private static AutogradNode? s_last;

    private readonly Func<AutogradNode, Tensor?[], Tensor?[]> _backward;
    private readonly List<IntPtr> _saved = [];
    private readonly IDisposable? _state;
    private readonly int _inputs;
    private readonly Native.Apply _apply;
    private readonly Native.Delete _delete;
    private Native.NodePtr _node;
    private IntPtr* _returned;
    private List<Tensor>? _returnedRoots;

    private AutogradNode(Tensor[] inputs, Func<AutogradNode, Tensor?[], Tensor?[]> backward, IDisposable? state)
    {
        (_inputs, _backward, _state) = (inputs.Length, backward, state);
        NeedsInputGrad = Array.ConvertAll(inputs, i => i.requires_grad);
        (_apply, _delete) = (OnApply, OnDelete);
    }

    /// <summary>For each input: whether its gradient is asked for.</summary>
    public IReadOnlyList<bool> NeedsInputGrad { get; }

    /// <summary>The number of nodes whose graph is still alive, in this process: a leak test's figure.</summary>
    public static int AliveCount { get { lock (s_alive) return s_alive.Count; } }

    /// <summary>
    /// y = forward(), recorded in the graph of <paramref name="inputs"/> so that <c>y.backward(dy)</c> calls
    /// <paramref name="backward"/>(node, dy), which returns one gradient or null for each input.
    /// </summary>
    /// <param name="inputs">Tensors that the output depends on; one that requires a gradient puts the node into the graph.</param>
    /// <param name="forward">Computes the output; runs without gradients where the node is recorded.</param>
    /// <param name="save">Tensors that backward needs, read there by <see cref="Unpack"/>.</param>
    /// <param name="backward">The closed form or the recomputation. What it captures lives as long as the graph does. A wrapper of an input among that,
    /// also by a closure shared with <paramref name="forward"/>, keeps the node before it alive: a chain of nodes that nobody disposes then takes
    /// the garbage collector one collection for each, and not one in all.</param>
    /// <param name="state">Disposed with the graph, whether backward ran or not.</param>
    public static Tensor Apply(Tensor[] inputs, Func<Tensor> forward, Tensor[] save, Func<AutogradNode, Tensor?[], Tensor?[]> backward, IDisposable? state = null)
    {
        if (!is_grad_enabled() || !inputs.Any(i => i.requires_grad)) return forward();
        Tensor raw;
        using (no_grad()) raw = forward(); // before anything native exists: an exception here leaks nothing
        var node = new AutogradNode(inputs, backward, state);
        try
        {
            return node.Record(inputs, raw, save);
        }
        finally
        {
            raw.Dispose(); // the graph-attached wrapper is another one
        }
    }

    /// <summary>loss.backward(), and an exception thrown inside a node's backward reaches the caller as it was.</summary>
    public static void Backward(Tensor loss, Tensor? gradient = null)
    {
        s_pending = null;
        try
        {
            if (gradient is null) loss.backward();
            else autograd.backward([loss], [gradient]);
        }
        catch (Exception) when (s_pending is { } inner)
        {
            System.Runtime.ExceptionServices.ExceptionDispatchInfo.Capture(inner).Throw();
        }
        finally
        {
            s_pending = null;
            DisposeLastReturned();
        }
    }

    /// <summary>A saved tensor; the caller disposes it.</summary>
    /// <exception cref="InvalidOperationException">Backward ran twice over a graph that was not retained.</exception>
    public Tensor Unpack(int index)
    {
        if (_saved[index] == 0)
            throw new InvalidOperationException("The saved tensors of this graph were already used and freed: backward runs once over a mini-sequence or recomputed layer.");
        var handle = Native.THSAutograd_SavedVariable_unpack(_saved[index], _node);
        CheckForErrors();
        return Tensor.UnsafeCreateTensor(handle);
    }

    /// <summary>Frees the saved tensors now, not when the graph dies.</summary>
    public void ReleaseSaved()
    {
        for (int i = 0; i < _saved.Count; i++)
        {
            if (_saved[i] != 0) Native.THSAutograd_SavedVariable_dispose(_saved[i]);
            _saved[i] = 0;
        }
    }

    private Tensor Record(Tensor[] inputs, Tensor raw, Tensor[] save)
    {
        _node = Native.THSAutograd_CSharpNode_ctor(_apply, _delete);
        CheckForErrors();
        lock (s_alive) s_alive.Add(this); // native code holds only the delegates
        var ins = stackalloc IntPtr[inputs.Length];
        for (int i = 0; i < inputs.Length; i++) ins[i] = inputs[i].Handle;
        var outs = stackalloc IntPtr[1];
        outs[0] = raw.Handle;
        var inArray = new Native.TensorArray(ins, inputs.Length);
        Native.THSAutograd_CSharpNode_setNextEdges(_node, inArray, true);
        Native.THSAutograd_CSharpNode_clearInputMetadata(_node);
        var result = stackalloc IntPtr[1];
        var resultAddress = (IntPtr)result;
        Native.Allocate allocate = _ => resultAddress;
        Native.THSAutograd_Function_wrapOutputs(inArray, default, default, new Native.TensorArray(outs, 1), _node, allocate);
        CheckForErrors();
        GC.KeepAlive(allocate);
        foreach (var t in save)
        {
            _saved.Add(Native.THSAutograd_SavedVariable_ctor(t.Handle, _node, false));
            CheckForErrors();
        }
        Native.THSAutograd_CSharpNode_disposeSharedPtr(_node);
        _node.Shared = 0;
        GC.KeepAlive(inputs);
        GC.KeepAlive(save);
        return Tensor.UnsafeCreateTensor(result[0]);
    }

    private Native.TensorArray OnApply(IntPtr* handles, int count)
    {
        var gradients = new Tensor?[count];
        try
        {
            for (int i = 0; i < count; i++)
                gradients[i] = handles[i] == 0 ? null : Tensor.UnsafeCreateTensor(handles[i]).DetachFromDisposeScope();
            Tensor?[] result;
            using (NewDisposeScope())
            {
                result = _backward(this, gradients);
                foreach (var r in result) r?.DetachFromDisposeScope();
            }
            return HandOver(result);
        }
        catch (Exception e)
        {
            Interlocked.CompareExchange(ref s_pending, e, null);
            return default; // no gradients: the engine raises an error of its own, which unwinds native frames properly
        }
        finally
        {
            foreach (var g in gradients) g?.Dispose();
        }
    }

    // Native code copies the handles after this method has returned, so the wrappers live until the next backward on this thread.
    private Native.TensorArray HandOver(Tensor?[] result)
    {
        if (result.Length != _inputs) throw new InvalidOperationException($"Backward returned {result.Length} gradients for {_inputs} inputs.");
        if (_returned == null) _returned = (IntPtr*)NativeMemory.Alloc((nuint)_inputs, (nuint)sizeof(IntPtr));
        DisposeLastReturned();
        for (int i = 0; i < _inputs; i++) _returned[i] = result[i]?.Handle ?? 0;
        _returnedRoots = [.. result.OfType<Tensor>()];
        s_last = this;
        return new Native.TensorArray(_returned, _inputs);
    }

    private static void DisposeLastReturned()
    {
        s_last?.DisposeReturned();
        s_last = null;
    }

    private void DisposeReturned()
    {
        if (Interlocked.Exchange(ref _returnedRoots, null) is { } roots)
            foreach (var t in roots) t.Dispose();
    }

    private void OnDelete()
    {
        ReleaseSaved();
        DisposeReturned();
        _state?.Dispose();
        NativeMemory.Free(_returned);
        _returned = null;
        Native.THSAutograd_CSharpNode_disposeWeakPtr(_node);
        lock (s_alive) s_alive.Remove(this);
    }

    private static class Native
    {
        private const string Library = "LibTorchSharp";

        [StructLayout(LayoutKind.Sequential)]
        public readonly struct TensorArray(IntPtr* array, long size)
        {
            public readonly IntPtr Array = (IntPtr)array;
            public readonly long Size = size;
        }

        [StructLayout(LayoutKind.Sequential)]
        public struct NodePtr
        {
            public IntPtr Shared;
            public IntPtr Weak;
        }

        [UnmanagedFunctionPointer(CallingConvention.Cdecl)] public delegate TensorArray Apply(IntPtr* tensors, int count);
        [UnmanagedFunctionPointer(CallingConvention.Cdecl)] public delegate void Delete();
        [UnmanagedFunctionPointer(CallingConvention.Cdecl)] public delegate IntPtr Allocate(IntPtr count);

        [DllImport(Library)] public static extern NodePtr THSAutograd_CSharpNode_ctor(Apply apply, Delete delete);
        [DllImport(Library)] public static extern void THSAutograd_CSharpNode_disposeSharedPtr(NodePtr node);
        [DllImport(Library)] public static extern void THSAutograd_CSharpNode_disposeWeakPtr(NodePtr node);
        [DllImport(Library)] public static extern void THSAutograd_CSharpNode_setNextEdges(NodePtr node, TensorArray inputs, [MarshalAs(UnmanagedType.U1)] bool isExecutable);
        [DllImport(Library)] public static extern void THSAutograd_CSharpNode_clearInputMetadata(NodePtr node);
        [DllImport(Library)] public static extern void THSAutograd_Function_wrapOutputs(TensorArray inputs, TensorArray nonDifferentiable, TensorArray dirty, TensorArray outputs, NodePtr node, Allocate allocate);
        [DllImport(Library)] public static extern IntPtr THSAutograd_SavedVariable_ctor(IntPtr variable, NodePtr node, [MarshalAs(UnmanagedType.U1)] bool isInplaceOnView);
        [DllImport(Library)] public static extern void THSAutograd_SavedVariable_dispose(IntPtr variable);
        [DllImport(Library)] public static extern IntPtr THSAutograd_SavedVariable_unpack(IntPtr variable, NodePtr node);
    }
}
