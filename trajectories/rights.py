"""Who may do what in which project: pages ask here, keys ask here for their owners."""

from django.contrib.auth.backends import ModelBackend
from django.contrib.auth.base_user import AbstractBaseUser
from django.contrib.auth.models import AnonymousUser, User
from django.db.models import Model, QuerySet
from django.utils.functional import cached_property

from trajectories.models import Membership, Project, Role

# What each role may besides its own: an operator is also a researcher, everyone reads.
INCLUDES: dict[str, frozenset[str]] = {
    Role.READER: frozenset({Role.READER}),
    Role.RESEARCHER: frozenset({Role.RESEARCHER, Role.READER}),
    Role.OPERATOR: frozenset({Role.OPERATOR, Role.RESEARCHER, Role.READER}),
    Role.APPROVER: frozenset({Role.APPROVER, Role.READER}),
}
EVERYTHING = frozenset(role for roles in INCLUDES.values() for role in roles)


class RolesAlone(ModelBackend):
    """Signs people in. Roles say what they may; Django's own permissions count for nothing, so no page reads them."""

    def get_all_permissions(self, user_obj: AbstractBaseUser | AnonymousUser, obj: Model | None = None) -> set[str]:
        return set()


def roles(user: AbstractBaseUser | AnonymousUser | None, project: Project) -> frozenset[str]:
    """Every role that the user has in the project, with those that they include. A superuser has all."""
    if not isinstance(user, User) or not user.is_active:
        return frozenset()
    if user.is_superuser:
        return EVERYTHING
    held = Membership.objects.filter(user=user, project=project).values_list("role", flat=True)
    return frozenset(role for one in held for role in INCLUDES[one])


def may(user: AbstractBaseUser | AnonymousUser | None, project: Project, role: str) -> bool:
    return role in roles(user, project)


def projects(user: AbstractBaseUser | AnonymousUser | None, role: str = Role.READER) -> QuerySet[Project]:
    """The projects in which the user has the role."""
    if not isinstance(user, User) or not user.is_active:
        return Project.objects.none()
    if user.is_superuser:
        return Project.objects.all()
    holding = [held for held, included in INCLUDES.items() if role in included]
    return Project.objects.filter(memberships__user=user, memberships__role__in=holding).distinct()


class Held:
    """What one person holds everywhere, read once: for a page that asks for every noun it might offer."""

    def __init__(self, user: AbstractBaseUser | AnonymousUser | None) -> None:
        self.everything = isinstance(user, User) and user.is_active and user.is_superuser
        self._by_project: dict[int, frozenset[str]] = {}
        self._slugs: dict[int, str] = {}
        if isinstance(user, User) and user.is_active and not self.everything:
            held = Membership.objects.filter(user=user).order_by("project__slug")
            for project, slug, role in held.values_list("project", "project__slug", "role"):
                self._by_project[project] = self._by_project.get(project, frozenset()) | INCLUDES[role]
                self._slugs[project] = slug

    @cached_property
    def slugs(self) -> dict[int, str]:
        """Every project that the person sees: its slug by its number, in the order of the slugs."""
        if self.everything:
            return dict(Project.objects.order_by("slug").values_list("pk", "slug"))
        return self._slugs

    def anywhere(self, role: str) -> bool:
        return self.everything or any(role in roles for roles in self._by_project.values())

    def of(self, project: Project) -> frozenset[str]:
        return self.of_pk(project.pk)

    def of_pk(self, project: int) -> frozenset[str]:
        return EVERYTHING if self.everything else self._by_project.get(project, frozenset())
