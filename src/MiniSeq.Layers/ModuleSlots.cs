using System.Collections;
using System.Reflection;
using TorchSharp.Modules;
using static TorchSharp.torch;

namespace MiniSeq.Layers;

/// <summary>Puts another module where a child of a model is: in its field, its <c>Sequential</c> or its <c>ModuleList</c>, under its name.</summary>
internal static class ModuleSlots
{
    private const BindingFlags Instance = BindingFlags.Instance | BindingFlags.Public | BindingFlags.NonPublic | BindingFlags.DeclaredOnly;

    /// <summary>Replaces <paramref name="child"/> of <paramref name="parent"/> by wrap(child).</summary>
    /// <exception cref="InvalidOperationException">The child is no Module&lt;Tensor, Tensor&gt;, or its place has too narrow a type.</exception>
    public static void Replace(nn.Module parent, string name, nn.Module child, Func<nn.Module<Tensor, Tensor>, nn.Module<Tensor, Tensor>> wrap)
    {
        if (child is not nn.Module<Tensor, Tensor> old)
            throw new InvalidOperationException($"'{name}' of {parent.GetName()} is a {child.GetType().Name}, and only a Module<Tensor, Tensor> can run in mini-sequences.");
        var places = Places(parent, old).ToList();
        if (places.Count == 0)
            throw new InvalidOperationException($"'{name}' of {parent.GetName()} is held by nothing that takes a wrapper: declare its field as Module<Tensor, Tensor>, not as {child.GetType().Name}.");
        var wrapper = wrap(old);
        foreach (var put in places) put(wrapper);
        Register(parent, name, wrapper);
    }

    private static IEnumerable<Action<nn.Module<Tensor, Tensor>>> Places(nn.Module parent, nn.Module<Tensor, Tensor> child)
    {
        if (parent is Sequential)
        {
            // Sequential has no public way to replace a module: this is its list.
            var modules = (IList)typeof(Sequential).GetField("_modules", Instance)!.GetValue(parent)!;
            for (int i = 0; i < modules.Count; i++)
                if (ReferenceEquals(modules[i], child)) { int at = i; yield return m => modules[at] = m; }
        }
        if (parent.GetType() is { IsGenericType: true } type && type.GetGenericTypeDefinition() == typeof(ModuleList<>) && Fits(type.GetGenericArguments()[0]))
        {
            var list = (IEnumerable)parent;
            int at = list.Cast<object>().ToList().FindIndex(m => ReferenceEquals(m, child));
            if (at >= 0) yield return m => type.GetProperty("Item")!.SetValue(parent, m, [at]);
        }
        for (var t = parent.GetType(); t is not null && t != typeof(nn.Module); t = t.BaseType)
            foreach (var field in t.GetFields(Instance))
                if (Fits(field.FieldType) && ReferenceEquals(field.GetValue(parent), child)) yield return m => field.SetValue(parent, m);
    }

    private static bool Fits(Type place) => place.IsAssignableFrom(typeof(nn.Module<Tensor, Tensor>));

    // The base class refuses to register a name twice, and offers no other way: this is its dictionary, which keeps the order.
    private static void Register(nn.Module parent, string name, nn.Module module)
    {
        var children = typeof(nn.Module).GetField("_internal_submodules", Instance)!.GetValue(parent)!;
        if ((bool)children.GetType().GetMethod("ContainsKey", [typeof(string)])!.Invoke(children, [name])!)
            children.GetType().GetProperty("Item", typeof(nn.Module), [typeof(string)])!.SetValue(children, module, [name]);
    }
}
